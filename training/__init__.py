"""Training, from a configuration to the files that a run leaves; each room knows those below it.

together.py     several runs at once on one device, in turns of a step
train.py        a run from its first file to its last: train_and_evaluate
setup.py        a configuration -> a run that is ready
run.py          the epochs of a run, its state, and being there again
captured.py     a step on a GPU as one CUDA graph
step.py         one step on one batch; evaluation
report.py       what a run says of itself while it trains: metrics, log, bar, TensorBoard
checkpoint.py   the state of a run on disk
config.py       every setting: default, limits, help, flag
machine.py      device, number formats, memory, torch.compile, versions
native.py       the CPU kernels: compiled once on a machine, kept, loaded
processes.py    several processes, as torchrun starts them
tensorboard_log.py
"""
