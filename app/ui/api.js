// The service over HTTP: every refusal is a Problem that says what to do; the key is sent with each request.

const KEY = "headwater-key";

/** The API key, for as long as this tab lives. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** The question that a new model is to be asked first: the one that its predecessor answered badly. */
export const question = {
  keep: (model, prompt) => sessionStorage.setItem(`headwater-question-${model}`, prompt),
  of: (model) => sessionStorage.getItem(`headwater-question-${model}`),
};

/** What the service refused (RFC 9457), or that it could not be reached (status 0). */
export class Problem extends Error {
  constructor({ title, detail, status = 0, errors = [], request_id = null }) {
    super(detail || title);
    Object.assign(this, { title, detail, status, errors, request_id });
  }
}

/** The answer's body. `json`: a body; `form`: a FormData. Throws Problem, or AbortError where `signal` fired. */
export async function call(method, path, { json, form, signal } = {}) {
  const response = await send(method, path, { json, form, signal });
  return response.status === 204 ? null : response.json();
}

export const get = (path, signal) => call("GET", path, { signal });
export const post = (path, json, signal) => call("POST", path, { json, signal });

/** Every item of a list, as long as there are no more than `most`. */
export async function all(path, signal, most = 1000) {
  const items = [];
  let cursor = null;
  do {
    const page = await get(`${path}?limit=200${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`, signal);
    items.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor && items.length < most);
  return items;
}

/** The bytes behind an address, with the key, as a blob. */
export const blob = async (path) => (await send("GET", path)).blob();

async function send(method, path, { json, form, signal, accept, lastId } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (accept) headers.Accept = accept;
  if (lastId) headers["Last-Event-ID"] = lastId;
  let response;
  try {
    const body = json !== undefined ? JSON.stringify(json) : form;
    response = await fetch(path, { method, headers, body, signal, credentials: "omit", referrerPolicy: "no-referrer" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const detail = "Check that the service runs and that this computer can reach it, then try again.";
    throw new Problem({ title: "The service does not answer", detail });
  }
  if (response.ok) return response;
  const problem = await refusal(response);
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-wanted", { detail: problem }));
  throw problem;
}

async function refusal(response) {
  try {
    return new Problem(await response.json());
  } catch {
    const detail = "It said nothing more. Something between this page and the service may be in the way.";
    return new Problem({ title: `The answer was ${response.status}`, detail, status: response.status });
  }
}

/**
 * Server-sent events as `{event, data}`, by fetch, which can send the key. A connection that breaks is taken up again
 * behind the last event that was seen; a refusal is thrown.
 */
export async function* events(path, signal) {
  let lastId = null;
  for (let pause = 500; ; pause = Math.min(pause * 2, 10_000)) {
    try {
      const response = await send("GET", path, { signal, accept: "text/event-stream", lastId });
      for await (const one of parsed(response.body)) {
        lastId = one.id ?? lastId;
        pause = 500;
        yield one;
        if (one.event === "end") return;
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Problem && error.status && error.status < 500)) throw error;
    }
    await new Promise((go) => setTimeout(go, pause));
    if (signal.aborted) return;
  }
}

async function* parsed(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = {};
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data !== undefined) yield { ...event, data: JSON.parse(event.data) };
        event = {};
        continue;
      }
      const [, name, text] = line.match(/^([^:]*):? ?(.*)$/);
      if (name === "data") event.data = event.data === undefined ? text : `${event.data}\n${text}`;
      else if (name) event[name] = text;
    }
  }
}

let document_ = null;
/** The schema of a request body, as the running service describes it: options that it has appear by themselves. */
export async function schema(name) {
  document_ ??= get("/openapi.json");
  try {
    return (await document_).components.schemas[name];
  } catch (error) {
    document_ = null;
    throw error;
  }
}
