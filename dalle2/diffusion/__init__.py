"""Diffusion: schedules, objectives, samplers and guidance, for tensors of any shape.

Read in this order: `schedule` (how noise is added), `objective` (what a network learns),
`samplers` (how noise is removed), `guidance` (how a condition is followed), `noise` (the random
numbers of each candidate).
"""
