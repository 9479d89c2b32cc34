//! Keys of data: wrapped by a key manager, sealed to the one host that may open them.

use std::fmt::Debug;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;

use super::contract::SealKey;
use super::contract::Sealed;
use crate::Result;

/// The name of a key that wraps others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KeyName(pub String);

/// A data key that only its key manager can unwrap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// By which key.
    pub by: KeyName,
    /// The cipher text.
    pub body: Bytes,
}

/// Wraps data keys and seals them to hosts; it never gives one out in the clear.
///
/// # Contract
/// 1. `aad-binds`: a key generated with one `aad` is refused with another.
/// 2. `seal-to-one`: a sealed key opens only with the private half of `to`.
///
/// Prove yours with `testing::conformance::small` (feature `conformance`).
#[async_trait]
pub trait KeyManager: Debug + Send + Sync + 'static {
    /// Makes a data key.
    async fn generate(&self, key: &KeyName, aad: &[u8]) -> Result<WrappedKey>;
    /// Wraps the same data key anew, by the newest version of its key.
    async fn rewrap(&self, wrapped: &WrappedKey, aad: &[u8]) -> Result<WrappedKey>;
    /// Seals the data key to a host.
    async fn seal(&self, wrapped: &WrappedKey, aad: &[u8], to: &SealKey) -> Result<Sealed>;
}
