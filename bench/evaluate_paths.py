"""`python -m greedynas_ext.bench`, by the name that it had before: the same options, the same file of results."""

from greedynas_ext.bench.command import main

if __name__ == "__main__":
    main()
