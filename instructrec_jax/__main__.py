"""``python -m instructrec_jax``: the command ``instructrec``, where its script is not on the path."""

from instructrec_jax.cli import main

if __name__ == "__main__":  # processes that are spawned import this module once more
    main()
