//! `GET /v1/openapi.json`: every route of the service, as OpenAPI 3.1.
//!
//! Each route of [`super::Service::router`] has its line in [`paths`]; `tests/it/openapi.rs` compares the two.

use super::{Service, access::Right};
use crate::avatar::{Act, LIVELIEST, LONGEST_S};
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// `GET /v1/openapi.json`
pub(super) async fn document(State(service): State<Arc<Service>>) -> Response {
    let key = |path: &str, method: &str| {
        let right = service.rights.get().and_then(|rights| rights.get(path));
        matches!(right, Some(Right::Control | Right::Metrics)) || (right == Some(&Right::Visitor) && method == "post")
    };
    Json(build(service.config.portrait_max_mb, key)).into_response()
}

/// One operation: its method, what it does, what it takes, what it answers.
struct Op(&'static str, Value);

/// `answers`: status, sentence, media type ("" = no body) and schema.
fn op(method: &'static str, summary: &str, answers: &[(u16, &str, &str, Value)]) -> Op {
    let mut responses = Map::new();
    for (status, text, kind, schema) in answers {
        let mut answer = json!({ "description": text });
        if !kind.is_empty() {
            answer["content"] = json!({ *kind: { "schema": schema } });
        }
        responses.insert(status.to_string(), answer);
    }
    // What any route may answer: an error is always the same shape.
    responses.insert("default".into(), json!({ "$ref": "#/components/responses/Error" }));
    Op(method, json!({ "summary": summary, "responses": responses }))
}

impl Op {
    fn takes(mut self, kind: &str, schema: Value) -> Op {
        self.1["requestBody"] = json!({ "required": true, "content": { kind: { "schema": schema } } });
        self
    }
    fn query(mut self, name: &str, schema: Value, text: &str) -> Op {
        self.parameter(name, "query", schema, text, false);
        self
    }
    fn header(mut self, name: &str, text: &str, required: bool) -> Op {
        self.parameter(name, "header", json!({ "type": "string" }), text, required);
        self
    }
    /// Needs the session's token.
    fn token(mut self) -> Op {
        self.1["security"] = json!([{ "bearer": [] }, { "token": [] }]);
        self
    }
    fn parameter(&mut self, name: &str, place: &str, schema: Value, text: &str, required: bool) {
        let one = json!({ "name": name, "in": place, "required": required, "schema": schema, "description": text });
        match self.1["parameters"].as_array_mut() {
            Some(all) => all.push(one),
            None => self.1["parameters"] = json!([one]),
        }
    }
}

fn schema(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn text() -> Value {
    json!({ "type": "string" })
}

const JSON: &str = "application/json";
const SDP: &str = "application/sdp";
const FRAGMENT: &str = "application/trickle-ice-sdpfrag";

/// What a two-way, WHIP or WHEP endpoint has in common: `OPTIONS` and `GET`.
fn offers(post: Op) -> Vec<Op> {
    vec![
        post.takes(SDP, text()),
        op(
            "options",
            "What may be posted (Accept-Post), and ICE servers (Link)",
            &[(200, "Headers only", "", json!(0))],
        ),
        op(
            "get",
            "Nothing to see, which is no error",
            &[(204, "Nothing", "", json!(0)), (200, "Nothing", "", json!(0))],
        ),
    ]
}

/// A connection that an offer made (RFC 9725).
fn connection() -> Vec<Op> {
    vec![
        op(
            "patch",
            "Adds ICE candidates (If-Match: the ETag) or restarts ICE (If-Match: *)",
            &[(204, "Candidates taken", "", json!(0)), (200, "Restarted: our new credentials", FRAGMENT, text())],
        )
        .header("If-Match", "The connection's ETag, or *", true)
        .takes(FRAGMENT, text()),
        op("delete", "Ends the connection", &[(200, "Ended", "", json!(0))]),
        op("options", "What may be patched", &[(200, "Headers only", "", json!(0))]),
        op(
            "get",
            "Nothing to see, which is no error",
            &[(204, "Nothing", "", json!(0)), (200, "Nothing", "", json!(0))],
        ),
    ]
}

/// A session on its way to another server.
fn publication() -> Value {
    json!({
        "type": "object",
        "required": ["id", "url", "state", "since_s", "attempts"],
        "properties": {
            "id": text(),
            "url": text(),
            "state": { "enum": ["connecting", "live", "waiting", "failed", "stopped"] },
            "reason": text(),
            "since_s": { "type": "number" },
            "attempts": { "type": "integer" },
        },
    })
}

/// A session in a LiveKit room. What plugins send besides is ignored.
fn room() -> Op {
    let mut op = op(
        "post",
        "A session in a LiveKit room, as agents' avatar plugins ask for one",
        &[(201, "In the room", JSON, schema("InRoom"))],
    )
    .header("x-api-key", "Any; a form needs this or Authorization", false)
    .takes(JSON, schema("Invitation"));
    op.1["requestBody"]["content"]["multipart/form-data"] = json!({ "schema": schema("InvitationForm") });
    op
}

/// Every path of the router with its operations.
fn paths() -> Vec<(&'static str, Vec<Op>)> {
    let answer = [(201, "The answer; Location and ETag name the connection", SDP, text())];
    let page = |what| op("get", what, &[(200, "The page", "text/html", text()), (304, "Unchanged", "", json!(0))]);
    vec![
        ("/", vec![page("The page")]),
        (
            "/{file}",
            vec![op(
                "get",
                "A file of the page",
                &[(200, "The file", "*/*", json!({})), (304, "Unchanged", "", json!(0))],
            )],
        ),
        (
            "/v1/info",
            vec![op("get", "What a page needs to know before it starts", &[(200, "Facts", JSON, schema("Info"))])],
        ),
        (
            "/v1/openapi.json",
            vec![op("get", "This document", &[(200, "OpenAPI 3.1", JSON, json!({ "type": "object" }))])],
        ),
        (
            "/v1/live",
            offers(
                op("post", "Begins a two-way conversation of one page", &answer)
                    .query("presenter", text(), "A presenter's id, portrait:ID of an uploaded picture, or design:LOOK")
                    .query(
                        "seed",
                        json!({ "type": "integer", "minimum": 0 }),
                        "Same seed, same movements for the same voice",
                    ),
            ),
        ),
        ("/v1/live/{id}", connection()),
        (
            "/v1/sessions",
            vec![
                op("post", "Begins a session", &[(201, "It has begun", JSON, schema("Begun"))])
                    .takes(JSON, schema("Wanted")),
                op("get", "Sessions that live", &[(200, "All of them", JSON, schema("Sessions"))]),
            ],
        ),
        (
            "/v1/sessions/{id}",
            vec![
                op("get", "One session", &[(200, "As it is now", JSON, schema("Session"))]),
                op(
                    "patch",
                    "Shows another presenter, prompt or background from now on; 422 says what the engine cannot",
                    &[(200, "As it is now", JSON, schema("Session"))],
                )
                .takes(JSON, schema("Change")),
                op("delete", "Ends it; answers when its place is free", &[(204, "Ended", "", json!(0))]),
            ],
        ),
        (
            "/v1/sessions/{id}/whip",
            offers(op("post", "Speaks to a session: a WHIP publisher's offer (RFC 9725)", &answer).token()),
        ),
        (
            "/v1/sessions/{id}/whep",
            offers(
                op("post", "Watches a session: a WHEP player's offer; 409 while nothing is live", &answer)
                    .query(
                        "view",
                        text(),
                        "plain, stacked (colour over matte), green, … or #RRGGBB; usually the session's background",
                    )
                    .token(),
            ),
        ),
        ("/v1/sessions/{id}/whip/{connection}", connection()),
        ("/v1/sessions/{id}/whep/{connection}", connection()),
        ("/whip/{id}", offers(op("post", "To the session's WHIP endpoint", &[(307, "There", "", json!(0))]))),
        ("/whep/{id}", offers(op("post", "To the session's WHEP endpoint", &[(307, "There", "", json!(0))]))),
        (
            "/v1/sessions/{id}/publish",
            vec![
                op(
                    "post",
                    "Carries the session to another WHIP server",
                    &[(201, "It has begun", JSON, publication())],
                )
                .token()
                .takes(
                    JSON,
                    json!({
                        "type": "object",
                        "required": ["url"],
                        "additionalProperties": false,
                        "properties": { "url": { "type": "string", "format": "uri" }, "token": { "type": "string" } },
                    }),
                ),
                op(
                    "get",
                    "All publications of the session",
                    &[(200, "How they stand", JSON, json!({ "type": "array", "items": publication() }))],
                )
                .token(),
            ],
        ),
        (
            "/v1/sessions/{id}/publish/{publication}",
            vec![
                op("get", "One publication", &[(200, "How it stands", JSON, publication())]).token(),
                op("delete", "Ends it and tells the other server", &[(200, "How it stood last", JSON, publication())])
                    .token(),
            ],
        ),
        (
            "/v1/sessions/{id}/token",
            vec![op(
                "post",
                "A new token; the one before is worth nothing any more",
                &[(201, "The token", JSON, schema("Token"))],
            )],
        ),
        (
            "/v1/sessions/{id}/interrupt",
            vec![op("post", "Silence now: queued speech is dropped", &[(204, "Done", "", json!(0))]).token()],
        ),
        (
            "/v1/sessions/{id}/gesture",
            vec![
                op(
                    "post",
                    "The presenter looks somewhere, smiles, nods…; 422 where the engine takes no gestures",
                    &[(202, "It will, with its next pictures", "", json!(0))],
                )
                .takes(JSON, schema("Gesture"))
                .token(),
            ],
        ),
        (
            "/v1/sessions/{id}/live",
            offers(op("post", "A two-way page joins; its microphone is heard from now on", &answer).token()),
        ),
        (
            "/v1/sessions/{id}/ws",
            vec![
                op(
                    "get",
                    "A WebSocket: PCM16 and JSON in, events out (protocol: docs of the server's module ws)",
                    &[(101, "It is open", "", json!(0))],
                )
                .query(
                    "rate",
                    json!({ "type": "integer", "minimum": 8000, "maximum": 192_000 }),
                    "Samples per second of the sound",
                )
                .token(),
            ],
        ),
        (
            "/v1/sessions/{id}/say",
            vec![
                op(
                    "post",
                    "Speaks a text with the configured voice, sentence by sentence",
                    &[
                        (200, "Its first sound is there", JSON, schema("Saying")),
                        (202, "It waits for its turn or its voice", JSON, schema("Saying")),
                    ],
                )
                .takes(JSON, schema("Say"))
                .token(),
            ],
        ),
        (
            "/v1/sessions/{id}/recording",
            vec![
                op("post", "Begins a recording", &[(201, "It has begun", JSON, schema("Recording"))]).token(),
                op("get", "This session's recordings", &[(200, "All of them", JSON, schema("Recordings"))]).token(),
                op("delete", "Ends the recording", &[(200, "Its file is complete", JSON, schema("Recording"))]).token(),
            ],
        ),
        (
            "/v1/sessions/{id}/recording/{file}",
            vec![
                op(
                    "get",
                    "A recording's file, also while it grows",
                    &[
                        (200, "The file", "video/mp4", json!({})),
                        (206, "The range asked for", "video/mp4", json!({})),
                        (416, "The range lies outside the file", "", json!(0)),
                    ],
                )
                .header("Range", "bytes=FIRST-LAST", false)
                .token(),
            ],
        ),
        ("/v1/recordings", vec![op("get", "All recordings in the folder", &[(200, "Files", JSON, schema("Files"))])]),
        (
            "/v1/recordings/{file}",
            vec![
                op(
                    "get",
                    "A recording's file",
                    &[
                        (200, "The file", "video/mp4", json!({})),
                        (206, "The range asked for", "video/mp4", json!({})),
                        (416, "The range lies outside the file", "", json!(0)),
                    ],
                )
                .header("Range", "bytes=FIRST-LAST", false),
            ],
        ),
        ("/v1/livekit", vec![room()]),
        ("/v1/livekit/v1/sessions", vec![room()]),
        ("/v1/livekit/v1/session", vec![room()]),
        ("/v1/session", vec![room()]),
        ("/v1/presenters", vec![op("get", "Who can be shown", &[(200, "Presenters", JSON, schema("Presenters"))])]),
        (
            "/v1/presenters/{file}",
            vec![op("get", "A presenter's picture: ID.png", &[(200, "The picture", "image/png", json!({}))])],
        ),
        (
            "/v1/design",
            vec![op("get", "Traits of designed presenters", &[(200, "All of them", JSON, schema("Traits"))])],
        ),
        (
            "/v1/design/{file}",
            vec![op(
                "get",
                "What a look looks like: SEED,TRAIT=CHOICE,….png",
                &[(200, "A PNG of 256×256", "image/png", json!({}))],
            )],
        ),
        (
            "/v1/portraits",
            vec![
                op("post", "Keeps a picture of one's own for a while", &[(201, "Kept", JSON, schema("Portrait"))])
                    .query(
                        "consent",
                        text(),
                        "The statement that the person shown agreed; stored with the picture. Required",
                    )
                    .takes("image/*", json!({ "type": "string", "contentEncoding": "binary" })),
            ],
        ),
        ("/healthz", vec![op("get", "The process answers", &[(200, "ok", "text/plain", text())])]),
        (
            "/readyz",
            vec![op(
                "get",
                "New sessions can be had",
                &[(200, "Ready", JSON, schema("Ready")), (503, "Not now", JSON, schema("Ready"))],
            )],
        ),
        (
            "/v1/status",
            vec![op(
                "get",
                "Sessions, stages, queues: how the service is",
                &[(200, "Facts", JSON, json!({ "type": "object" }))],
            )],
        ),
        ("/metrics", vec![op("get", "Counters in Prometheus' text format", &[(200, "Numbers", "text/plain", text())])]),
    ]
}

fn object(required: &[&str], properties: Value) -> Value {
    json!({ "type": "object", "required": required, "properties": properties })
}

/// As [`object`], for bodies: what is not known is an error.
fn closed(required: &[&str], properties: Value) -> Value {
    let mut all = object(required, properties);
    all["additionalProperties"] = json!(false);
    all
}

fn schemas() -> Value {
    let (string, whole, number) = (text(), json!({ "type": "integer", "minimum": 0 }), json!({ "type": "number" }));
    let maybe = |kind: &str| json!({ "type": [kind, "null"] });
    let lively = json!({ "type": ["number", "null"], "minimum": 0, "maximum": LIVELIEST });
    let gestures: Vec<&str> = Act::ALL.iter().map(|a| a.0).collect();
    let limit = json!({ "type": ["integer", "null"], "minimum": 0 });
    let session = json!({
        "id": string, "state": { "enum": ["connecting", "preparing", "idle", "speaking", "draining", "closed"] },
        "presenter": string, "engine": string, "age_s": whole, "sinks": whole, "width": whole, "height": whole,
        "fps": whole, "speech_buffered_ms": number,
    });
    let names =
        ["id", "state", "presenter", "engine", "age_s", "sinks", "width", "height", "fps", "speech_buffered_ms"];
    let token = json!({ "token": string, "token_expires_in_s": whole, "urls": { "type": "object", "additionalProperties": string } });
    let mut begun = session.clone();
    for (key, value) in token.as_object().into_iter().flatten() {
        begun[key] = value.clone();
    }
    let token_names = ["token", "token_expires_in_s", "urls"];
    let presenter = object(
        &["id", "name", "description", "thumbnail"],
        json!({
            "id": string, "name": string, "description": string, "thumbnail": string,
        }),
    );
    let part = object(&["file", "url"], json!({ "file": string, "url": string }));
    let recording = object(
        &["state", "parts", "bytes", "length_s", "pictures_dropped", "error"],
        json!({
            "state": { "enum": ["running", "over"] }, "parts": { "type": "array", "items": part }, "bytes": whole,
            "length_s": number, "pictures_dropped": whole, "error": maybe("string"),
        }),
    );
    json!({
        "Error": object(&["error"], json!({
            "error": object(&["code", "message"], json!({ "code": string, "message": string, "reconnect": string })),
            "reason": string, "message": string,
        })),
        "Wanted": closed(&[], json!({
            "presenter": maybe("string"), "prompt": maybe("string"), "engine": maybe("string"),
            "profile": maybe("string"), "background": maybe("string"), "seed": limit, "liveliness": lively,
            "livekit": { "oneOf": [schema("Room"), { "type": "null" }] },
            "limits": closed(&[], json!({ "max_session_s": limit, "idle_timeout_s": limit })),
        })),
        "Room": closed(&["url", "token"], json!({ "url": string, "token": string, "agent": maybe("string") })),
        "Invitation": object(&[], json!({
            "url": maybe("string"), "token": maybe("string"),
            "livekit_url": maybe("string"), "livekit_token": maybe("string"),
            "properties": { "type": ["object", "null"], "properties": {
                "livekit_url": maybe("string"), "livekit_token": maybe("string"),
            } },
            "livekit": { "oneOf": [schema("Room"), { "type": "null" }] },
            "presenter": maybe("string"), "avatar_id": maybe("string"), "agent_id": maybe("string"),
            "agent_prompt": maybe("string"), "image": maybe("string"), "idle_timeout": maybe("number"), "seed": limit,
        })),
        "InvitationForm": object(&[], json!({
            "payload": string, "livekit_url": string, "livekit_token": string, "avatar_id": string,
            "image": { "type": "string", "contentEncoding": "binary" },
            "avatar_image": { "type": "string", "contentEncoding": "binary" },
        })),
        "InRoom": object(&["id", "session_id", "token", "room"], json!({
            "id": string, "session_id": string, "token": string, "room": string,
        })),
        "Change": closed(&[], json!({
            "presenter": maybe("string"), "prompt": maybe("string"), "background": maybe("string"),
            "liveliness": lively,
        })),
        "Gesture": closed(&["gesture"], json!({
            "gesture": { "enum": gestures },
            "strength": { "type": "number", "minimum": 0, "maximum": 1, "default": 1 },
            "seconds": { "type": "number", "minimum": 0.1, "maximum": LONGEST_S, "default": 2 },
        })),
        "Session": object(&names, session),
        "Begun": object(&[&names[..], &token_names[..]].concat(), begun),
        "Token": object(&token_names, token),
        "Sessions": object(&["sessions"], json!({ "sessions": { "type": "array", "items": schema("Session") } })),
        "Say": closed(&["text"], json!({ "text": string, "interrupt": { "type": "boolean" } })),
        "Saying": object(&["state", "sentences"], json!({
            "state": { "enum": ["speaking", "waiting"] }, "segment": whole, "sentences": whole,
        })),
        "Recording": recording,
        "Recordings": object(&["recordings"], json!({
            "recordings": { "type": "array", "items": schema("Recording") },
        })),
        "Files": object(&["recordings"], json!({ "recordings": { "type": "array", "items": object(
            &["file", "url", "bytes"], json!({ "file": string, "url": string, "bytes": whole }),
        ) } })),
        "Presenters": object(&["presenters"], json!({
            "presenters": { "type": "array", "items": presenter }, "default": maybe("string"),
        })),
        "Traits": object(&["traits", "presenter", "picture"], json!({
            "traits": { "type": "object", "additionalProperties": { "type": "array", "items": string } },
            "presenter": string, "picture": string,
        })),
        "Portrait": object(&["id", "presenter", "width", "height", "expires_after_s", "consent", "consented_at", "warnings"], json!({
            "warnings": { "type": "array", "items": object(&["code", "message"], json!({ "code": string, "message": string })) }, "consent": string, "consented_at": whole, "nearest": string, "id": string, "presenter": string, "width": whole, "height": whole, "expires_after_s": whole,
        })),
        "Info": object(&["version", "engine", "ice_servers", "portrait_max_bytes"], json!({
            "version": string, "engine": { "type": "object" }, "ice_servers": { "type": "array" },
            "portrait_max_bytes": whole,
        })),
        "Ready": object(&["ready", "state", "slots", "slots_used"], json!({
            "ready": { "type": "boolean" }, "state": string, "why": string, "slots": whole, "slots_used": whole,
        })),
    })
}

/// `key`: whether a route wants a key where there are keys.
fn build(portrait_max_mb: usize, key: impl Fn(&str, &str) -> bool) -> Value {
    let mut all = Map::new();
    for (path, ops) in paths() {
        let mut item = Map::new();
        let names: Vec<Value> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": text() }))
            .collect();
        if !names.is_empty() {
            item.insert("parameters".into(), Value::Array(names));
        }
        for Op(method, mut value) in ops {
            if key(path, method) {
                value["security"] = json!([{}, { "key": [] }]);
            }
            item.insert(method.into(), value);
        }
        all.insert(path.into(), Value::Object(item));
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Loquent",
            "version": env!("CARGO_PKG_VERSION"),
            "description": format!(
                "A live avatar service: speech in, a speaking presenter out. Pictures of up to {portrait_max_mb} MB."
            ),
        },
        "paths": all,
        "components": {
            "schemas": schemas(),
            "responses": { "Error": {
                "description": "A code for programs and a sentence for people",
                "content": { JSON: { "schema": schema("Error") } },
            } },
            "securitySchemes": {
                "key": { "type": "http", "scheme": "bearer", "description": "An API key; only where the service has keys" },
                "bearer": { "type": "http", "scheme": "bearer", "description": "The session's token" },
                "token": { "type": "apiKey", "in": "query", "name": "token" },
            },
        },
    })
}
