// Requests to the server. Each failure throws an Error whose message is shown to the user.

const UNREACHABLE = "The server cannot be reached. Is it still running?";

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(UNREACHABLE);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Error(sentence(body.error?.message ?? `the server answered with status ${response.status}`));
}

function post(path, content, signal) {
  const headers = { "content-type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(content), signal });
}

export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");
}

// Size, preview and warnings of an image.
export async function describeImage(file, name) {
  const headers = { "content-type": "application/octet-stream" };
  const path = `/api/image?name=${encodeURIComponent(name)}`;
  return (await send(path, { method: "POST", headers, body: file })).json();
}

// Tile grids of images, for each model.
export async function planTiles(sizes) {
  return (await post("/api/plan", { sizes })).json();
}

export async function exportConversation(content) {
  return (await post("/api/export", content)).blob();
}

export async function fetchFile(path, name) {
  return new File([await (await send(path)).blob()], name);
}

// Parts of a streamed answer: an object per line.
export async function* streamAnswer(content, signal) {
  const response = await post("/api/answer", content, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(UNREACHABLE);
    }
    if (part.done) break;
    const lines = (text + part.value).split("\n");
    text = lines.pop();
    yield* lines.map((line) => JSON.parse(line));
  }
}
