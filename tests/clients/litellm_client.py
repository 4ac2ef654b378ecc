"""litellm's two providers of Ollama against a server: prints what it saw as one JSON object."""

from __future__ import annotations

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm

url, model = sys.argv[1:3]
hello = [{"role": "user", "content": "Say hi"}]
seen: dict[str, object] = {}
for provider in ("ollama", "ollama_chat"):
    asked = {"model": f"{provider}/{model}", "messages": hello, "api_base": url, "max_tokens": 8, "temperature": 0}
    answer = litellm.completion(**asked)
    seen[provider] = answer.choices[0].message.content
    seen[f"{provider} usage"] = answer.usage.completion_tokens
    parts = litellm.completion(**asked, stream=True)
    seen[f"{provider} streamed"] = "".join(part.choices[0].delta.content or "" for part in parts)
vectors = litellm.embedding(model=f"ollama/{model}", input=["a"], api_base=url)
seen["embedding"] = len(vectors.data[0]["embedding"])
try:
    litellm.completion(model="ollama_chat/nope", messages=hello, api_base=url)
except Exception as error:
    seen["unknown"] = str(error)
print(json.dumps(seen))
