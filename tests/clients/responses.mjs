// What OpenAI's SDK for Node makes of Responses: create, stream, parse, and a stored conversation. Run by tests/process/test_clients.py.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ maxRetries: 0 });
const model = "gpt-4o";

const made = await client.responses.create({ model, input: "hi", instructions: "Be brief." });
assert.equal(made.output_text, "one");
assert.deepEqual(await client.responses.retrieve(made.id).then((kept) => kept.output), made.output);

const stream = client.responses.stream({ model, input: "more", previous_response_id: made.id });
let deltas = "";
stream.on("response.output_text.delta", (event) => (deltas += event.delta));
const final = await stream.finalResponse();
assert.equal(deltas, "two");
assert.equal(final.output_text, "two");
assert.equal(final.previous_response_id, made.id);

const Person = z.object({ name: z.string(), age: z.number() });
const parsed = await client.responses.parse({ model, input: "who?", text: { format: zodTextFormat(Person, "person") } });
assert.deepEqual(parsed.output_parsed, { name: "Ada", age: 36 });

const tools = [zodResponsesFunction({ name: "ls", parameters: z.object({ path: z.string() }) })];
const called = await client.responses.stream({ model, input: "list", tools }).finalResponse();
assert.deepEqual(called.output[0].parsed_arguments, { path: "/" });

await client.responses.delete(made.id);
await assert.rejects(client.responses.retrieve(made.id), OpenAI.NotFoundError);
console.log("all held");
