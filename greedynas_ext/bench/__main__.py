"""Runs the command line."""

from greedynas_ext.bench.command import main

if __name__ == "__main__":
    main()
