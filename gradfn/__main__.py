"""`python -m gradfn` is the `gradfn` command."""

from gradfn.cli import main

if __name__ == "__main__":
    main()
