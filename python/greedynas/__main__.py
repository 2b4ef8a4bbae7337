"""`python -m greedynas`: the command line where the script `greedynas` is not on the path."""

from greedynas.cli import main

if __name__ == "__main__":
    main()
