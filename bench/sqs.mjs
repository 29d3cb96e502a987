// sqs.mjs create | load | produce | consume
import { readFileSync, createWriteStream } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { Agent, request } from "undici";
import { CreateQueueCommand, SendMessageBatchCommand, SendMessageCommand, SQSClient } from "@aws-sdk/client-sqs";
import { Consumer } from "sqs-consumer";

const env = process.env;
const queueUrl = env.BENCH_SQS_QUEUE_URL;
const sqs = new SQSClient({
  endpoint: env.BENCH_SQS_URL ?? "http://127.0.0.1:1",
  useQueueUrlAsEndpoint: false,
  region: "us-east-1",
  credentials: { accessKeyId: "x", secretAccessKey: "x" },
});
const ids = () => readFileSync(env.BENCH_IDS, "utf8").trim().split("\n");
const headers = { "content-type": "application/json" };

const dispatcher = new Agent({ connections: 160 });
async function post(widgetId) {
  const response = await request(env.BENCH_MAKER_URL, { method: "POST", headers, dispatcher, body: JSON.stringify({ widget_id: widgetId }) });
  await response.body.text();
  if (response.statusCode >= 300) throw new Error(`the maker answered ${response.statusCode}`);
}

const command = process.argv[2];
if (command === "create") {
  await sqs.send(new CreateQueueCommand({ QueueName: "widgets", Attributes: { VisibilityTimeout: "300" } }));
} else if (command === "load") {
  const every = ids();
  const start = performance.now();
  for (let at = 0; at < every.length; at += 10) {
    const Entries = every.slice(at, at + 10).map((id, number) => ({ Id: `${number}`, MessageBody: id }));
    await sqs.send(new SendMessageBatchCommand({ QueueUrl: queueUrl, Entries }));
  }
  console.log(JSON.stringify({ loaded: every.length, seconds: (performance.now() - start) / 1000 }));
} else if (command === "produce") {
  const out = createWriteStream(env.BENCH_PRODUCED);
  const start = performance.now();
  for (const [number, id] of ids().entries()) {
    await sleep(Math.max(0, start + (number * 1000) / env.BENCH_RATE - performance.now()));
    out.write(`${id} ${(performance.timeOrigin + performance.now()) / 1e3}\n`);
    await sqs.send(new SendMessageCommand({ QueueUrl: queueUrl, MessageBody: id }));
  }
  out.end();
} else if (command === "consume") {
  for (let number = 0; number < (env.BENCH_CONSUMERS ?? 2); number++) {
    const consumer = Consumer.create({
      queueUrl, sqs, batchSize: 10, waitTimeSeconds: 20, suppressFifoWarning: true,
      handleMessage: async (message) => { await post(message.Body); return message; },
    });
    consumer.on("error", (error) => console.error(error.message));
    consumer.on("processing_error", (error) => console.error(error.message));
    consumer.start();
  }
} else {
  throw new Error(`no such command: ${command}`);
}
