//! The token of a target: where the volume's files are on this host.

use std::path::PathBuf;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::id::Pool;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Target;
use serde::Deserialize;
use serde::Serialize;

/// The scheme and version of our tokens.
pub(crate) const SCHEME: (&str, u16) = ("raw-file", 1);

/// What [`prepare`](iaas_core::spi::dataplane::BlockOpener::prepare) needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    pub(crate) folder: PathBuf,
    pub(crate) pool: Id<Pool>,
    pub(crate) volume: Id<PoolVolume>,
}

impl Token {
    /// The form of a target.
    pub(crate) fn form(&self) -> Result<Form> {
        let mut token = Vec::new();
        ciborium::into_writer(self, &mut token)
            .map_err(|e| Error::internal("a token cannot be written").because(&e))?;
        Ok(Form::Opener { scheme: SCHEME.0.into(), version: SCHEME.1, token: Bytes::from(token) })
    }

    /// The token in a target.
    ///
    /// # Errors
    /// `Unsupported`: it has no form of ours. `Invalid`: ours cannot be read.
    pub(crate) fn of(target: &Target) -> Result<Self> {
        let ours = target.forms.iter().find_map(|form| match form {
            Form::Opener { scheme, version, token } if (scheme.as_str(), *version) == SCHEME => Some(token),
            _ => None,
        });
        let ours = ours.ok_or_else(|| {
            Error::unsupported("the volume is not a raw file of this version")
                .remedy("use the opener of its scheme")
        })?;
        let token: Self = ciborium::from_reader(&ours[..])
            .map_err(|e| Error::invalid("the token of a raw file cannot be read").because(&e))?;
        if token.volume.uuid() != target.id {
            return Err(Error::invalid("the token of a raw file is that of another volume"));
        }
        Ok(token)
    }
}

/// The name of a volume's bytes.
pub(crate) fn data_name(volume: Id<PoolVolume>) -> String {
    format!("{}.raw", volume.uuid())
}

/// The name of a volume's record.
pub(crate) fn meta_name(volume: Id<PoolVolume>) -> String {
    format!("{}.meta", volume.uuid())
}
