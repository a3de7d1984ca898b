"""Where Hydra looks for launchers: it takes none from elsewhere than hydra_plugins."""

from sparse_lab.sweep import launchers


class BasicLauncher(launchers.Basic):
    """hydra/launcher=basic"""


class JoblibLauncher(launchers.Joblib):
    """hydra/launcher=joblib"""


class RayLauncher(launchers.Ray):
    """hydra/launcher=ray"""


class LocalLauncher(launchers.SubmititLocal):
    """hydra/launcher=submitit_local"""


class SlurmLauncher(launchers.SubmititSlurm):
    """hydra/launcher=submitit_slurm"""
