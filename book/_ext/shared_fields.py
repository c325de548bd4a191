"""Fields described together ("train, test : float") stay together; Sphinx splits at spaces."""

import re

FIELD = re.compile(r"^:(ivar|vartype) (\w+(?:, \w+)+):")
BREAK = ",\N{ZERO WIDTH SPACE}"  # a comma after which a line may end, but no space


def keep_together(line: str) -> str:
    """Write the names of one field list entry as one word."""
    return FIELD.sub(lambda found: f":{found[1]} {found[2].replace(', ', BREAK)}:", line)


def _edit(app, what, name, obj, options, lines):
    lines[:] = map(keep_together, lines)


def setup(app):
    """Edit each docstring after napoleon has read it."""
    app.connect("autodoc-process-docstring", _edit, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
