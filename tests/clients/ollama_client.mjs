// ollama's own JavaScript client against a server: prints what it saw as one JSON object.
import { Ollama } from 'ollama'

const [url, model] = process.argv.slice(2)
const client = new Ollama({ host: url })
const options = { temperature: 0, num_predict: 12 }
const messages = [{ role: 'user', content: 'Say hi' }]
const seen = {}

seen.version = (await client.version()).version
seen.list = (await client.list()).models.map((one) => one.model)
seen.capabilities = (await client.show({ model })).capabilities
seen.chat = (await client.chat({ model, messages, options })).message.content
seen.streamed = ''
for await (const part of await client.chat({ model, messages, options, stream: true })) seen.streamed += part.message.content
seen.generate = (await client.generate({ model, prompt: 'Say hi', options })).response
seen.embed = (await client.embed({ model, input: ['a', 'b'] })).embeddings.map((vector) => vector.length)
try {
  await client.chat({ model: 'nope', messages })
} catch (error) {
  seen.unknown = [error.status_code, error.message]
}
// Leaving a stream: the next request is answered at once.
const stream = await client.generate({ model, prompt: 'Count to a thousand', options: { num_predict: 2000 }, stream: true })
for await (const part of stream) {
  seen.first = part.response
  stream.abort()
  break
}
const startedAt = Date.now()
await client.generate({ model, prompt: 'Say hi', options: { ...options, num_predict: 2 } })
seen.after_abort_ms = Date.now() - startedAt
console.log(JSON.stringify(seen))
