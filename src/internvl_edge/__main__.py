"""``python -m internvl_edge``: the command line."""

from internvl_edge.cli import main

if __name__ == "__main__":
    main()
