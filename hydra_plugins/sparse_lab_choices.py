"""Where Hydra finds the choices that plugins bring (`sparse_lab.register_choices`), wherever it composes."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from sparse_lab.config import CHOICES


class Choices(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in CHOICES:
            search_path.append("plugin", f"file://{folder}")
