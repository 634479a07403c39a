//! TLS by file: a certificate chain and its key in PEM, read again when they change, so that a renewal needs no restart.

use super::Config;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{
    sync::{Arc, RwLock},
    time::SystemTime,
};
use tokio_rustls::TlsAcceptor;

/// The certificate in force and what connections are accepted with.
pub(super) struct Tls {
    cert: String,
    key: String,
    current: Arc<Current>,
    stamps: RwLock<Stamps>,
    pub(super) acceptor: TlsAcceptor,
}

type Stamps = [Option<SystemTime>; 2];

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(|e| e.into_inner()).clone())
    }
}

impl Tls {
    /// `None` where no certificate is configured.
    ///
    /// # Errors
    /// A sentence that names the file and what is wrong with it.
    pub(super) fn new(config: &Config) -> Result<Option<Tls>, String> {
        let (cert, key) = (config.tls_cert.clone(), config.tls_key.clone());
        match (cert.is_empty(), key.is_empty()) {
            (true, true) => return Ok(None),
            (false, false) => {}
            _ => return Err("set both server.tls_cert and server.tls_key, or neither".into()),
        }
        let stamps = stamps(&cert, &key);
        let current = Arc::new(Current(RwLock::new(Arc::new(load(&cert, &key)?))));
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().map_err(|e| e.to_string())?;
        let mut server = builder.with_no_client_auth().with_cert_resolver(current.clone());
        server.alpn_protocols = vec![b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(server));
        Ok(Some(Tls { cert, key, current, stamps: RwLock::new(stamps), acceptor }))
    }

    /// Reads the files again, if they changed or `always`. Files that do not fit together change nothing.
    pub(super) fn reload(&self, always: bool) {
        let stamps = stamps(&self.cert, &self.key);
        if !always && *self.stamps.read().unwrap_or_else(|e| e.into_inner()) == stamps {
            return;
        }
        *self.stamps.write().unwrap_or_else(|e| e.into_inner()) = stamps;
        match load(&self.cert, &self.key) {
            Ok(new) => {
                *self.current.0.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(new);
                tracing::info!("the certificate was read again");
            }
            Err(why) => tracing::error!("the certificate stays as it was: {why}"),
        }
    }
}

fn stamps(cert: &str, key: &str) -> Stamps {
    [cert, key].map(|file| std::fs::metadata(file).ok()?.modified().ok())
}

fn load(cert: &str, key: &str) -> Result<CertifiedKey, String> {
    let wrong = |name: &str, file: &str, e: &dyn std::fmt::Display| {
        format!("server.{name} = \"{file}\" cannot be used: {e}; allowed is a PEM file")
    };
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(|all| all.collect::<Result<Vec<_>, _>>())
        .map_err(|e| wrong("tls_cert", cert, &e))?;
    if chain.is_empty() {
        return Err(wrong("tls_cert", cert, &"it holds no certificate"));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| wrong("tls_key", key, &e))?;
    CertifiedKey::from_der(chain, private, &ring::default_provider()).map_err(|e| wrong("tls_key", key, &e))
}
