"""A chat in the terminal: a conversation that is typed, and answers that stream.  Needs the extra `chat`."""

from models.process import begin_as_module

begin_as_module()
