"""What a time step should cost, read off the compiled kernel's machine code; see perf/README.md. Nothing is measured.

machine_code.py parses it, path.py finds the instructions of a step, issue.py lets warps issue them, waiting.py lets the
programs of a grid wait for each other, model.py puts these together, constants.py has every number that is assumed.
loops.py and agreement.py compare the cost model that plans are chosen by with all that is modelled and measured.
"""
