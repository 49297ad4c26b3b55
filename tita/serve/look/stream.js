// Gradio takes the stream of its news for open until it has heard that the server has closed it. What begins in between
// is answered where nobody listens. So the stream goes on here while anything is under way, and Gradio hears nothing of
// such an end.
(() => {
  const ask = window.fetch.bind(window), underWay = new Set(), endedEarly = new Set();

  async function begin(...request) {
    const nameless = Symbol();
    underWay.add(nameless);
    try {
      const reply = await ask(...request);
      const {event_id} = reply.ok ? await reply.clone().json() : {};
      if (event_id && !endedEarly.delete(event_id)) underWay.add(event_id);
      return reply;
    } finally {
      underWay.delete(nameless);
    }
  }

  async function* messages(reply) {
    const reader = reply.body.getReader(), decoder = new TextDecoder();
    let rest = "", part = await reader.read();
    for (; !part.done; part = await reader.read()) {
      const whole = (rest + decoder.decode(part.value, {stream: true})).split("\n\n");
      rest = whole.pop();
      yield* whole;
    }
  }

  async function* news(request, reply) {
    let goesOn;
    do {
      goesOn = false;
      for await (const message of messages(reply)) {
        const {msg, event_id} = message.startsWith("data:") ? JSON.parse(message.slice(5)) : {};
        if (msg === "process_completed" && !underWay.delete(event_id)) endedEarly.add(event_id);
        goesOn = msg === "close_stream" && underWay.size > 0;
        if (!goesOn) yield `${message}\n\n`;
      }
      if (goesOn) reply = await ask(request);
    } while (goesOn);
  }

  async function listen(request) {
    const reply = await ask(request);
    if (!reply.ok) return reply;
    const told = news(request, reply), encoder = new TextEncoder();
    const pull = async stream => {
      try {
        const {value, done} = await told.next();
        if (done) stream.close();
        else stream.enqueue(encoder.encode(value));
      } catch (error) {
        underWay.clear();
        if (request.signal.aborted) stream.close();
        else stream.error(error);
      }
    };
    return new Response(new ReadableStream({pull}), {status: reply.status, headers: reply.headers});
  }

  window.fetch = (input, init) => {
    const {pathname} = new URL(input.url ?? input, location.href);
    if (pathname.endsWith("/queue/join")) return begin(input, init);
    if (pathname.endsWith("/queue/data")) return listen(new Request(input, init));
    return ask(input, init);
  };
})();
