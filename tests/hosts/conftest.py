from tests.graphs.conftest import taped

__all__ = ["taped"]
