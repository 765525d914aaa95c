"""Fuzzing: commands read random and damaged input, and must succeed or explain in one line.

    make fuzz MINUTES=10

Each input is a command line of `dalle1` with the files that it reads. It runs in this process, so
thousands of them take minutes. `harness` decides what is a failure.
"""
