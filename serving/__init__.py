"""The server: OpenAI's API over HTTP for the engine, and a page to chat in.

One thread owns the engine (`scheduler`); whatever comes over the network is parsed, checked and tokenized before it reaches the
queue, and made into text after.  Needs the extra `serve`.
"""

from models.process import begin_as_module

begin_as_module()
