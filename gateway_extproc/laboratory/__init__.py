"""The laboratory: strategies compared on a simulated fleet, in simulated time, by the gateway's own code for choosing.

``gateway-extproc compare`` replays a trace, or one that a scenario generates (scenarios.py), once for each strategy
(replay.py, on the pods of machines.py), and prints what came of it (report.py). Equal seeds give equal results on every
machine. Leaves out everything that is not choosing: limits, retries, the network.
"""
