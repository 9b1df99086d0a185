// OpenAI's own Node client on a running mesh: MESH_TEST_URL and MESH_TEST_MODEL name it.
//
// The model is tiny: what is checked is structure and sameness, never wisdom.

import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const model = process.env.MESH_TEST_MODEL;
const client = new OpenAI({
  baseURL: process.env.MESH_TEST_URL,
  apiKey: "not looked at",
  maxRetries: 0,
  timeout: 100_000,
});
const messages = [{ role: "user", content: "What is a mesh network?" }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Weather of a city",
    parameters: {
      type: "object",
      properties: {
        city: { type: "string", maxLength: 10 },
        unit: { type: "string", enum: ["celsius", "fahrenheit"] },
      },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};

const dot = (left, right) => left.reduce((sum, value, index) => sum + value * right[index], 0);

async function gather(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

test("chat", async () => {
  const answer = await client.chat.completions.create({
    model, messages, temperature: 0, max_tokens: 12,
  });
  assert.match(answer.id, /^chatcmpl-/);
  assert.equal(answer.model, model);
  assert.equal(answer.choices.length, 1);
  assert.equal(answer.choices[0].finish_reason, "length");
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.ok(answer.choices[0].message.content);
  assert.equal(answer.usage.completion_tokens, 12);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + 12);
  assert.ok(answer._request_id);
});

test("a stream joins to the whole answer", async () => {
  const asked = { model, messages, temperature: 0, seed: 1, max_tokens: 12 };
  const whole = await client.chat.completions.create(asked);
  const chunks = await gather(
    await client.chat.completions.create({
      ...asked, stream: true, stream_options: { include_usage: true },
    }),
  );
  const text = chunks.flatMap((chunk) => chunk.choices).map((c) => c.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.ok(chunks.length > 4);
  assert.equal(chunks.at(-1).usage.completion_tokens, 12);
  assert.deepEqual(chunks.at(-1).choices, []);
});

test("a stream can be left", async () => {
  const stream = await client.chat.completions.create({
    model, messages, max_tokens: 3000, ignore_eos: true, stream: true,
  });
  let seen = 0;
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    seen += 1;
    if (seen === 3) break;
  }
  assert.equal(seen, 3);
  assert.ok(stream.controller.signal.aborted);
});

test("the client's own gathering of events", async () => {
  const stream = client.chat.completions.stream({
    model, messages, guided_regex: "(mesh ){4}",
  });
  let told = "";
  stream.on("content", (delta) => { told += delta; });
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.content, "mesh ".repeat(4));
  assert.equal(told, "mesh ".repeat(4));
});

test("many at once do not mix", async () => {
  const numbers = Array.from({ length: 10 }, (_, index) => `answer-${index}`);
  const answers = await Promise.all(
    numbers.map((wanted) => client.chat.completions.create({ model, messages, guided_regex: wanted })),
  );
  assert.deepEqual(answers.map((answer) => answer.choices[0].message.content), numbers);
});

test("an answer in the form of a schema", async () => {
  const schema = {
    type: "object",
    properties: {
      name: { type: "string", maxLength: 12 },
      kind: { type: "string", enum: ["town", "city"] },
    },
    required: ["name", "kind"],
    additionalProperties: false,
  };
  const answer = await client.chat.completions.create({
    model, messages, seed: 3,
    response_format: { type: "json_schema", json_schema: { name: "place", schema, strict: true } },
  });
  const value = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(value).sort(), ["kind", "name"]);
  assert.ok(["town", "city"].includes(value.kind));
  assert.equal(answer.choices[0].finish_reason, "stop");
});

test("a forced tool, and its result", async () => {
  const asked = {
    model, messages, tools: [weather], temperature: 0, max_tokens: 120,
    tool_choice: { type: "function", function: { name: "get_weather" } },
  };
  const called = await client.chat.completions.create(asked);
  assert.equal(called.choices[0].finish_reason, "tool_calls");
  const { message } = called.choices[0];
  const [call] = message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "unit"]);
  const answer = await client.chat.completions.create({
    ...asked,
    messages: [...messages, message, { role: "tool", tool_call_id: call.id, content: "sunny" }],
    tool_choice: "none",
    max_tokens: 8,
  });
  assert.ok(answer.choices[0].message.content);
});

test("streamed arguments join to JSON", async () => {
  const stream = client.chat.completions.stream({
    model, messages, tools: [weather], tool_choice: "required", parallel_tool_calls: false,
    temperature: 0, max_tokens: 120,
    user: "streams", // of another owner than the same question before, or it comes in one piece
  });
  const pieces = [];
  for await (const chunk of stream) {
    for (const piece of chunk.choices[0]?.delta.tool_calls ?? []) pieces.push(piece);
  }
  const text = pieces.map((piece) => piece.function.arguments ?? "").join("");
  assert.ok(pieces.length > 3);
  assert.deepEqual(Object.keys(JSON.parse(text)).sort(), ["city", "unit"]);
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, text);
});

test("completions", async () => {
  const answer = await client.completions.create({
    model, prompt: ["The sea is", "One, two,"], echo: true, temperature: 0, max_tokens: 4,
  });
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  assert.ok(answer.choices[0].text.startsWith("The sea is"));
  assert.ok(answer.choices[1].text.startsWith("One, two,"));
});

test("embeddings, by the client's default and as numbers", async () => {
  const input = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Stock markets fell."];
  const packed = await client.embeddings.create({ model, input });
  const plain = await client.embeddings.create({ model, input, encoding_format: "float" });
  const [cat, same, stocks] = packed.data.map((entry) => Array.from(entry.embedding));
  for (const [index, vector] of [cat, same, stocks].entries()) {
    assert.ok(Math.abs(dot(vector, vector) - 1) < 1e-4);
    assert.ok(dot(vector, plain.data[index].embedding) > 0.9999);
  }
  assert.ok(dot(cat, same) > dot(cat, stocks));
});

test("models", async () => {
  const names = [];
  for await (const found of client.models.list()) names.push(found.id);
  assert.deepEqual(names, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("errors are of the classes that programs catch", async () => {
  const ask = (fields, options) =>
    client.chat.completions.create({ model, messages, max_tokens: 4, ...fields }, options);
  await assert.rejects(ask({ temperature: 3 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.deepEqual([error.status, error.param, error.code], [400, "temperature", "invalid_value"]);
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(ask({ messages: [{ role: "user", content: "word ".repeat(5000) }] }), {
    constructor: OpenAI.BadRequestError, code: "context_length_exceeded",
  });
  await assert.rejects(ask({ model: "gpt-9" }), {
    constructor: OpenAI.NotFoundError, code: "model_not_found", param: "model",
  });
  await assert.rejects(ask({ messages: [{ role: "user", content: "x".repeat(9 << 20) }] }), {
    status: 413, code: "payload_too_large",
  });
  await assert.rejects(ask({ max_tokens: 3000, ignore_eos: true }, { timeout: 500 }), {
    constructor: OpenAI.APIConnectionTimeoutError,
  });
  const leaving = new AbortController();
  setTimeout(() => leaving.abort(), 300);
  await assert.rejects(ask({ max_tokens: 3000, ignore_eos: true }, { signal: leaving.signal }), {
    constructor: OpenAI.APIUserAbortError,
  });
});
