//! The page: embedded in the program, or from a folder while somebody works on it.

use super::{Service, error::ApiError};
use axum::{
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

/// One file of the page. The list is closed: a folder given by `web_dir` is read by these names only, so no path can
/// leave it.
struct Asset {
    name: &'static str,
    kind: &'static str,
    body: &'static [u8],
}

macro_rules! asset {
    ($name:literal, $kind:literal) => {
        Asset { name: $name, kind: $kind, body: include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/web/", $name)) }
    };
}

static ASSETS: [Asset; 18] = [
    asset!("index.html", "text/html; charset=utf-8"),
    asset!("app.js", "text/javascript; charset=utf-8"),
    asset!("design.js", "text/javascript; charset=utf-8"),
    asset!("live.js", "text/javascript; charset=utf-8"),
    asset!("meter.js", "text/javascript; charset=utf-8"),
    asset!("style.css", "text/css; charset=utf-8"),
    asset!("i18n.js", "text/javascript; charset=utf-8"),
    asset!("player.js", "text/javascript; charset=utf-8"),
    asset!("matte.js", "text/javascript; charset=utf-8"),
    asset!("overlay.html", "text/html; charset=utf-8"),
    asset!("overlay.js", "text/javascript; charset=utf-8"),
    asset!("bot.html", "text/html; charset=utf-8"),
    asset!("bot.js", "text/javascript; charset=utf-8"),
    asset!("status.html", "text/html; charset=utf-8"),
    asset!("status.js", "text/javascript; charset=utf-8"),
    asset!("status.css", "text/css; charset=utf-8"),
    asset!("stage.css", "text/css; charset=utf-8"),
    asset!("icon.svg", "image/svg+xml"),
];

/// `GET /`
pub(super) async fn index(State(service): State<Arc<Service>>, headers: HeaderMap) -> Response {
    page(&service, "index.html", &headers).await
}

/// `GET /{file}`
pub(super) async fn file(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let name = match name.as_str() {
        // Browsers ask for this name unasked.
        "favicon.ico" => "icon.svg",
        "overlay" => "overlay.html",
        "bot" => "bot.html",
        "status" => "status.html",
        name => name,
    };
    page(&service, name, &headers).await
}

async fn page(service: &Service, name: &str, headers: &HeaderMap) -> Response {
    let Some(asset) = ASSETS.iter().find(|a| a.name == name) else {
        return super::guard::no_route().await.into_response();
    };
    let folder = &service.config.web_dir;
    let body = if folder.is_empty() {
        bytes::Bytes::from_static(asset.body)
    } else {
        match tokio::fs::read(std::path::Path::new(folder).join(asset.name)).await {
            Ok(body) => body.into(),
            Err(e) => {
                let message = format!("{name} could not be read from server.web_dir: {e}");
                return ApiError::not_found("no_such_page", message).into_response();
            }
        }
    };
    // Asked again at each visit, answered with 304 when unchanged: never an old script with a new page.
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    let tag = format!("\"{:016x}\"", hasher.finish());
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|v| v.as_bytes() == tag.as_bytes());
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, asset.kind)], body).into_response()
    };
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}
