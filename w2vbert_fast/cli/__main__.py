"""`python -m w2vbert_fast.cli`."""

from w2vbert_fast.cli import main

if __name__ == "__main__":
    main()
