"""The modules named after a step have its function, `run(config, run=...) -> frozen result`.

Of the others, `execution` calls these functions, `step` is the life that they share, `address` finds trained networks,
and `finish` and `janitor` are for runs of KFP, whose end they record.
"""
