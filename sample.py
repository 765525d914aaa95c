"""Sample images for a prompt: many candidates, reranked by CLIP (paper §2.6).

    python sample.py "an avocado armchair"

The same as `dalle1 sample`; its code is in dalle1/commands/sample.py.
"""

from dalle1.cli import run

if __name__ == "__main__":
    run("sample")
