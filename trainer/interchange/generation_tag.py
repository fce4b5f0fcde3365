"""The tag {% generation %} … {% endgeneration %} of chat templates: what is between was written by the assistant.

transformers defined it (apply_chat_template with return_assistant_tokens_mask).
"""

from collections.abc import Callable

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from trainer.interchange.chat import BEGIN, END


class GenerationTag(Extension):
    """Writes BEGIN and END around the content of the tag."""

    used = False  # whether the template has the tag

    tags = {"generation"}  # noqa: RUF012 (Jinja defines it so)

    def parse(self, parser: Parser) -> nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"
