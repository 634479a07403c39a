//! What wraps every route: deadlines, panics turned into answers, security headers, CORS, counts.

use super::{Service, access, error::ApiError, spread};
use crate::telemetry::metrics;
use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// Nothing but our own files; no inline script or style; nobody may put the page in a frame.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
     media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const PERMISSIONS_POLICY: &str = "microphone=(self), fullscreen=(self), autoplay=(self), speaker-selection=(self), \
     screen-wake-lock=(self), camera=(), geolocation=(), display-capture=(), usb=(), serial=(), midi=(), \
     payment=()";

/// The outermost layer: lets in, counts the answer, adds the headers that every answer carries.
pub(super) async fn outer(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let origin = request.headers().get(header::ORIGIN).cloned();
    let route = request.extensions().get::<MatchedPath>().map(|p| p.as_str().to_owned());
    let allowed = origin.filter(|o| service.allows_origin(o));

    let mut response = match (&allowed, is_preflight(&method, request.headers())) {
        (Some(_), true) => preflight(),
        _ => {
            let (mut parts, body) = request.into_parts();
            match access::admit(&service, route.as_deref(), &parts) {
                Ok(caller) => {
                    parts.extensions.insert(caller.clone());
                    let request = Request::from_parts(parts, body);
                    let answer = spread::reach(&service, route.as_deref(), caller, request, next);
                    bounded(service.config.request_timeout(), answer).await
                }
                Err(refused) => refused.into_response(),
            }
        }
    };

    let headers = response.headers_mut();
    if !service.config.cors_origins.is_empty() {
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
    }
    if let Some(origin) = allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("Location, ETag, Link, Retry-After, Accept-Post, Accept-Patch"),
        );
    }
    let fixed: [(HeaderName, &'static str); 6] = [
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("permissions-policy"), PERMISSIONS_POLICY),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if matches!(&service.tls, Ok(Some(_))) {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }

    // The route's pattern, never the path: ids and typing errors must not become label values.
    let route = route.as_deref().unwrap_or("other");
    let method = if is_common(&method) { method.as_str() } else { "other" };
    metrics().http_requests.with_label_values(&[route, method, response.status().as_str()]).inc();
    response
}

fn is_common(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::POST, Method::PATCH, Method::DELETE, Method::OPTIONS, Method::PUT]
        .contains(method)
}

/// Runs the handler under the request's deadline; a panic becomes a 500 of this request alone.
pub(super) async fn bounded(limit: Duration, answer: impl Future<Output = Response>) -> Response {
    match tokio::time::timeout(limit, AssertUnwindSafe(answer).catch_unwind()).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => {
            tracing::error!("a request handler panicked; this is a bug");
            ApiError::internal("The server made a mistake with this request. Its log says more.").into_response()
        }
        Err(_) => ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout",
            format!("The request was not complete within {} s.", limit.as_secs()),
        )
        .into_response(),
    }
}

fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

fn preflight() -> Response {
    let headers: [(HeaderName, &'static str); 4] = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST, PATCH, DELETE, OPTIONS"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "Content-Type, If-Match, Authorization"),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
        // RFC 9725 §4.2 wants it here as well; on other routes it says nothing wrong.
        (HeaderName::from_static("accept-post"), "application/sdp"),
    ];
    (StatusCode::OK, headers).into_response()
}

/// 404 for whatever has no route.
pub(super) async fn no_route() -> ApiError {
    ApiError::not_found("no_such_page", "There is nothing at this address. The page is at /, the API under /v1/.")
}

/// 405; axum adds `Allow`.
pub(super) async fn no_method(method: Method) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{method} is not possible here; the Allow header names what is."),
    )
}
