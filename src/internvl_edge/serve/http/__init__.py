"""What every route shares of HTTP.

exchange  a request from its first to its last byte; start here
gate      keys, hosts, ids and the errors of whatever is not an exchange
problems  the errors that clients see
body      bodies, counted while they are read;  json_text  their JSON;  fields  what stands in it;
          images  pictures in it
events    answers as server-sent events
meters    metrics, and the stages of one request
"""
