// Talks with the server.
function headers() {
  const sent = { "Content-Type": "application/json" };
  if (store.key) sent.Authorization = "Bearer " + store.key;
  return sent;
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}

// The events of an answer, as they come; ends with the stream, throws what went wrong.
async function* answer(body, signal) {
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await failure(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the answer");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      yield told;
    }
  }
}

async function modelName() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  return (await response.json()).data[0].id;
}
