"""Child processes: start them, know when they are ready, restart them, end them with the parent.

Knows nothing of what the children do. `spawn` starts one, `supervise` keeps several running,
`ready` is what a child of ours calls once it can serve.
"""
