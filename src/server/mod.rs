//! axum: API, pages, WHIP-shaped routes, health, metrics, shutdown.
