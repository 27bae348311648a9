"""docs/scale.md from docs/scale.json."""


def write_page(results, path):
    pass
