//! What the story must remember over the death of its process. Everything else is asked from the cloud.

use std::path::Path;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::*;
use serde::Deserialize;
use serde::Serialize;

use crate::gaps::Seen;
use crate::machine;
use crate::supervise::Process;

/// The page in the state folder.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memory {
    /// The tenant.
    pub organization: Id<Organization>,
    /// Its project.
    pub project: Id<Project>,
    /// The instance that serves a page.
    pub web: Id<Instance>,
    /// The instance that fetches it.
    pub client: Id<Instance>,
    /// Where the page is.
    pub volume: Id<Volume>,
    /// Where web is plugged in.
    pub web_port: Id<Port>,
    /// Where client is plugged in.
    pub client_port: Id<Port>,
    /// What both start from.
    pub image: Id<Image>,
    /// How large both are.
    pub size: Id<InstanceType>,
    /// The prices.
    pub book: Id<PriceBook>,
    /// What web drew and wrote on the page.
    pub nonce: String,
    /// The kernels of web and client, as they named themselves.
    pub boot_ids: [String; 2],
    /// The control process that was about to be killed.
    pub control: Process,
    /// What client saw in the quiet period.
    pub quiet: Seen,
    /// Client's uptime when control was about to be killed; `None` if the guests were left running for long.
    pub killed_at: Option<f64>,
}

impl Memory {
    /// Reads the page; `None` if there is none.
    ///
    /// # Errors
    /// `Internal` if it is damaged.
    pub fn read(page: &Path) -> Result<Option<Self>> {
        match std::fs::read(page) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::internal("memory lost").because(&e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(machine::io(e)),
        }
    }

    /// Writes the page.
    ///
    /// # Errors
    /// `Unavailable` if there is no room.
    pub fn write(&self, page: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::internal("memory lost").because(&e))?;
        std::fs::write(page, text).map_err(machine::io)
    }
}
