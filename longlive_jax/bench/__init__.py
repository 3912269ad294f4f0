"""Speed, measured on whatever machine this runs on: `longlive bench`, and the rows of `experiments/speed`.

    timing   how a call is timed, alone and in turn with another
    machine  what it ran on, and what that could do at most
    counts   FLOPs of a pass, a block, a recache and a decode
    weights  random weights of any size, for ours and for PyTorch
    ours     our programs, compiled and run in the steady state
    published, official   the same work in diffusers and in the official PyTorch code
    report   all of it for one model: the JSON and the table

Nothing here needs the command line's packages or a text encoder, so it also runs where only JAX and Flax are installed.
"""
