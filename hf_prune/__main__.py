"""`python -m hf_prune`: the command line."""

from hf_prune.cli.main import app

app(prog_name="hf-prune")
