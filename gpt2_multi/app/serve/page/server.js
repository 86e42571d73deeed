// OpenAI's API, as far as the page asks it; what goes wrong is one sentence.

const CHOICES = 3;
const ALTERNATIVES = 5;
const TRIES = 6; // with less and less text, until the server takes it
const LETTERS = 4; // of a token of English, before the server has counted any
const MARGIN = 0.97; // of what should just fit
const GONE = "The server does not answer. Is gpt2-multi serve still running? Your text is kept here.";
const UNREADABLE = "The server's answer is no completion.";
const BROKEN = "The server's answer broke off.";

export class Refused extends Error {
  constructor(status, sentence, code) {
    super(sentence);
    this.status = status;
    this.code = code;
  }
}

export class Server {
  constructor(key) {
    this.key = key;
    this.limit = null; // tokens of a prompt and its completion
    this.letters = LETTERS;
  }

  // The model: its name, and how much it reads where the server says so.
  async model() {
    const { data } = await (await this.#call("v1/models")).json().catch(unreadable);
    this.limit = data[0].max_model_len ?? this.limit;
    return data[0].id;
  }

  // Three continuations of the end of a text: {choices, seed, read}, `read` being how much of it the model saw. It is
  // also given to `grown`, time and again while it is written. Without a temperature three would be the same.
  async complete(text, { temperature, topP, length, seed }, signal, grown) {
    const asked = { max_tokens: length, temperature, top_p: topP, n: temperature ? CHOICES : 1, logprobs: ALTERNATIVES };
    Object.assign(asked, { stream: true, stream_options: { include_usage: true } });
    if (seed !== null) asked.seed = seed;
    let most = this.limit === null ? text.length : this.#room(length);
    for (let tries = TRIES; ; tries--) {
      const prompt = ending(text, most);
      try {
        const answer = { choices: [], read: prompt.length };
        for await (const event of this.#events("v1/completions", { ...asked, prompt }, signal)) {
          extend(answer, event);
          grown(answer);
        }
        this.#count(prompt.length, answer.usage?.prompt_tokens);
        return answer;
      } catch (error) {
        if (error.code !== "context_length_exceeded" || tries === 1 || prompt.length < 2) throw error;
        this.#learn(error.message, prompt.length);
        most = Math.min(this.limit === null ? most : this.#room(length), Math.floor(prompt.length * 0.9));
      }
    }
  }

  // About how many tokens a text has.
  tokens(text) {
    return Math.round(text.length / this.letters);
  }

  #room(length) {
    return Math.max(1, Math.floor((this.limit - length) * this.letters * MARGIN));
  }

  #count(letters, tokens) {
    if (letters > 20 && tokens > 0) this.letters = letters / tokens;
  }

  #learn(message, letters) {
    const [, limit, prompt] = /is (\d+) tokens.*\((\d+) in the prompt/u.exec(message) ?? [];
    if (!limit) return;
    this.limit = Number(limit);
    this.#count(letters, Number(prompt));
  }

  async #call(path, body, signal) {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const how = body && { method: "POST", body: JSON.stringify(body) };
    if (body) headers["Content-Type"] = "application/json";
    try {
      const response = await fetch(path, { ...how, headers, signal, cache: "no-store" });
      if (!response.ok) throw await refusal(response);
      return response;
    } catch (error) {
      throw failure(error);
    }
  }

  // The server-sent events of an answer, up to the one that says that all is there.
  async *#events(path, body, signal) {
    const reader = (await this.#call(path, body, signal)).body.getReader();
    const decoder = new TextDecoder();
    let [rest, sentence] = ["", UNREADABLE];
    try {
      for (;;) {
        const { done, value } = await reader.read().catch((error) => Promise.reject(failure(error)));
        if (done && sentence) throw new Refused(0, sentence);
        if (done) return;
        const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          sentence = event === "data: [DONE]" ? "" : BROKEN;
          if (sentence) yield parsed(event);
        }
      }
    } finally {
      reader.cancel().catch(() => {});
    }
  }
}

function parsed(event) {
  try {
    return JSON.parse(event.replace(/^data: /u, ""));
  } catch (error) {
    return unreadable(error);
  }
}

// Put what an event brings to the choices that are there, in the order in which they began.
function extend(answer, event) {
  const { choices, seed, usage, error } = event ?? {};
  if (error) throw new Refused(0, spelled(error.message), error.code);
  if (!choices?.every?.((piece) => typeof piece.text === "string")) throw new Refused(0, UNREADABLE);
  Object.assign(answer, { seed, usage });
  for (const { index, text, logprobs } of choices) {
    const found = answer.choices.find((choice) => choice.index === index);
    const choice = found ?? { index, text: "", logprobs: {} };
    if (!found) answer.choices.push(choice);
    choice.text += text;
    for (const [name, more] of Object.entries(logprobs ?? {})) (choice.logprobs[name] ??= []).push(...more);
  }
}

function failure(error) {
  return error instanceof Refused || error.name === "AbortError" ? error : new Refused(0, GONE);
}

// The end of a text, of at most so many characters, from where a word begins: with its space, as tokens do.
export function ending(text, most) {
  if (text.length <= most) return text;
  const start = text.length - most;
  const border = /\s/u.exec(text.slice(start, start + Math.min(80, most / 2)));
  if (border) return text.slice(start + border.index + (border[0] === "\n" ? 1 : 0));
  return text.slice(/[\udc00-\udfff]/u.test(text[start]) ? start + 1 : start);
}

function unreadable(error) {
  throw error.name === "SyntaxError" ? new Refused(0, UNREADABLE) : failure(error);
}

async function refusal(response) {
  const { message = `status ${response.status}`, code } = (await response.json().catch(() => ({}))).error ?? {};
  return new Refused(response.status, sentence(response, message), code);
}

function sentence(response, message) {
  const seconds = Number(response.headers.get("retry-after"));
  if (response.status === 429) return `The server is busy; ask again in ${seconds > 1 ? `${seconds} seconds` : "a second"}.`;
  return spelled(message);
}

function spelled(message) {
  return `${message[0].toUpperCase()}${message.slice(1)}${/[.!?]$/u.test(message) ? "" : "."}`;
}
