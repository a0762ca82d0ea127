"""Training, from a configuration to the files that a run leaves. Each module knows those after it:

together train setup run captured step report checkpoint config native machine processes tensorboard_log
"""
