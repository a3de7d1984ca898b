"""`sparse-lab bench`: speed on this machine as ratios, measured in one process, the candidates in turn.

cells        what is measured, and what came out: medians and spreads of ratios within a round
patterns     masks of a sparsity: ERK, one global threshold, SynFlow
training, inference   the candidates of a network, each ready to be called
layers, opponents     single layers, in other libraries too
rounds       who is measured when, within a number of minutes
roofline     what the machine could do at best
memory       peak memory of a step, each in a process of its own
compute      all of that, one network after the other
table, picture        what is printed, written and drawn
train, phases, together, train_table   `bench train`: whole runs, and loops beside them
selection, masks      two benches of their own: finding the best weights, enforcing masks
"""
