"""LangChain's client of Ollama against a server: prints what it saw as one JSON object."""

from __future__ import annotations

import json
import sys

from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int


url, model = sys.argv[1:3]
chat = ChatOllama(model=model, base_url=url, temperature=0, num_predict=12, validate_model_on_init=True)
answer = chat.invoke("Say hi")
structured = ChatOllama(model=model, base_url=url, temperature=0, num_predict=60)
person = structured.with_structured_output(Person, method="json_schema").invoke("Bob is 5 years old")
seen = {
    "chat": answer.content,
    "usage": answer.usage_metadata,
    "streamed": "".join(str(part.content) for part in chat.stream("Say hi")),
    "batch": [one.content for one in chat.batch(["Say hi"] * 4)],
    "llm": OllamaLLM(model=model, base_url=url, temperature=0, num_predict=8).invoke("Say hi"),
    "person": person.model_dump(),
    "embedding": len(OllamaEmbeddings(model=model, base_url=url).embed_query("x")),
}
print(json.dumps(seen))
