"""Model cards, of which saving an adapter writes one."""

import functools

import jinja2


def compile_template_once() -> None:
    """Keep the compiled template of the card. To compile it each time takes two thirds of what saving takes."""
    if not hasattr(jinja2.Environment.compile, "cache_info"):
        jinja2.Environment.compile = functools.lru_cache(jinja2.Environment.compile)
