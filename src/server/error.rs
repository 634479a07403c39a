//! What a caller is told when a request cannot be served: always JSON, always a sentence.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use std::time::Duration;

/// An answer that is not the wanted one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    /// A word for programs, stable across versions.
    pub(super) code: &'static str,
    /// A sentence for people: what was wrong and what to do.
    pub(super) message: String,
    pub(super) retry_after: Option<Duration>,
    /// Where to begin anew.
    pub(super) reconnect: Option<String>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Told<'a>,
    /// Only with 503: why the service refuses, and for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
}

#[derive(Serialize)]
struct Told<'a> {
    code: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reconnect: Option<&'a str>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, code, message: message.into(), retry_after: None, reconnect: None }
    }
    pub(super) fn bad_request(code: &'static str, message: impl Into<String>) -> ApiError {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }
    pub(super) fn not_found(code: &'static str, message: impl Into<String>) -> ApiError {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }
    /// 422: understood, and still of no use here.
    pub(super) fn unusable(code: &'static str, message: impl Into<String>) -> ApiError {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, message)
    }
    /// 503 with `Retry-After`.
    pub(super) fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Duration) -> ApiError {
        let mut e = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        e.retry_after = Some(retry_after);
        e
    }
    pub(super) fn internal(message: impl Into<String>) -> ApiError {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let refusal = self.status == StatusCode::SERVICE_UNAVAILABLE;
        let body = Body {
            error: Told { code: self.code, message: &self.message, reconnect: self.reconnect.as_deref() },
            reason: refusal.then_some(self.code),
            message: refusal.then_some(self.message.as_str()),
        };
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(after) = self.retry_after {
            // At least a second: zero would invite an immediate return.
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        response
    }
}
