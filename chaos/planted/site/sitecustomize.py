"""Python imports this at its start where PYTHONPATH names this folder."""

from chaos.planted import plant

plant()
