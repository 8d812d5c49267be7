"""Files and the machine: the lowest room, which knows nothing of models.

disk     whole files, durable names, locks, and the disk's errors as ours; start here
reading  files that others wrote: regular, bounded, and where their links lead
terminal texts that others wrote, as a terminal may show them
spool    arrays that are too many for memory, read again from a file
memory   what the machine has free, and what a process takes;  cores  how many it may use
cgroups  the control groups that may allow less of both
content  what a file is by its first bytes, where it is not what its name says
packages what is installed, what it is for, and the extra that brings it
telemetry what libraries would report to their vendors, turned off
helper   processes of our own, isolated from code of others
forks    what a forked child must leave alone
signals  Ctrl-C and SIGTERM, held back where they would do harm
"""
