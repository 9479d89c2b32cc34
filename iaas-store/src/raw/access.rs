//! Access: which volumes of a pool may be opened on this host, by whom.
//!
//! Each has a small file `<id>.access` in the host's folder, so that it is seen after a restart. The volume itself is looked
//! at when it is asked for.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::id::Cloud;
use iaas_core::id::Pool;
use iaas_core::model::Host;
use iaas_core::spi::Call;
use iaas_core::spi::Converge;
use iaas_core::spi::Ctx;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Phase;
use iaas_core::spi::Seen;
use iaas_core::spi::Site;
use iaas_core::spi::Tag;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessObserved;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::VolumeAccess;
use iaas_core::spi::target::Target;
use serde::Deserialize;
use serde::Serialize;
use sha2::Digest as _;
use sha2::Sha256;
use uuid::Uuid;

use super::pool::absolute;
use super::sidecar::Sidecar;
use super::sidecar::State;
use super::site::SiteBase;
use super::site::blocking;
use super::site::not_older;
use super::site::own;
use super::site::provider;
use super::site::removable;
use super::site::stamp;
use super::small;
use super::small::gone;
use super::token::Token;
use super::token::meta_name;
use super::trouble;
use crate::rawio::RawFolder;
use crate::rawio::RealFolder;

/// Makes the volumes of a [`RawPool`](crate::RawPool) reachable on the host that has its folder.
#[derive(Clone, Debug)]
pub struct RawAccess {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    base: Arc<SiteBase>,
    /// Where the records of access are.
    records: Arc<dyn RawFolder>,
    volumes: Arc<dyn RawFolder>,
    path: PathBuf,
    pool: Id<Pool>,
}

/// A record of access as it is stored, in front of its checksum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    format: u16,
    tag: Tag,
    spec: AccessSpec,
}

impl RawAccess {
    /// Opens the access of `host` to the pool in `folder`. `state` is the host's folder of state. Blocks on small files.
    ///
    /// # Errors
    /// `Unavailable`: a folder cannot be read or written.
    pub fn open(
        folder: &Path,
        state: &Path,
        cloud: Id<Cloud>,
        host: Id<Host>,
        pool: Id<Pool>,
    ) -> Result<Self> {
        let io = |e: std::io::Error| trouble("make the folder", &e);
        let path = absolute(folder)?;
        let volumes = RealFolder::at(&path).map_err(io)?;
        let records = RealFolder::at(&state.join("access").join(pool.uuid().to_string())).map_err(io)?;
        let kind = <Access as iaas_core::Entity>::NAME;
        let install = install(&records)?;
        let base = SiteBase::open(state, cloud, Site::Host(host), install, kind, &[])?;
        let inner = Inner {
            base: Arc::new(base),
            records: Arc::new(records),
            volumes: Arc::new(volumes),
            path,
            pool,
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

provider!(RawAccess);

impl VolumeAccess for RawAccess {}

#[async_trait]
impl Converge<Access> for RawAccess {
    #[tracing::instrument(name = "access.ensure", skip_all, fields(op = %cx.call.op, access = %id))]
    async fn ensure(&self, cx: &Ctx, id: Id<Access>, rev: Rev, spec: &AccessSpec) -> Result<Seen<Access>> {
        let (inner, call, spec) = (self.inner.clone(), cx.call.clone(), *spec);
        let effect = move || inner.ensure(&call, id, rev, spec);
        self.inner.base.act(&cx.call, id.object(), effect).await
    }

    #[tracing::instrument(name = "access.remove", skip_all, fields(op = %cx.call.op, access = %id))]
    async fn remove(&self, cx: &Ctx, id: Id<Access>, upto: Rev) -> Result<()> {
        let (inner, call) = (self.inner.clone(), cx.call.clone());
        let effect = move || inner.remove(&call, id, upto);
        self.inner.base.act(&cx.call, id.object(), effect).await
    }

    async fn observe(&self, cx: &Ctx, id: Id<Access>) -> Result<Option<Seen<Access>>> {
        let (inner, cloud) = (self.inner.clone(), cx.call.cloud);
        blocking(move || {
            let ours = inner.read(id)?.filter(|record| record.tag.cloud == cloud);
            ours.map(|record| inner.seen(&record)).transpose().map_err(|e| e.about(id.object()))
        })
        .await
    }

    async fn inventory(
        &self,
        cx: &Ctx,
        after: Option<Id<Access>>,
        limit: usize,
    ) -> Result<Vec<Found<Access>>> {
        let (inner, cloud) = (self.inner.clone(), cx.call.cloud);
        blocking(move || {
            let ids = inner.ids()?.into_iter().filter(|id| after.is_none_or(|after| *id > after));
            Ok(ids.filter_map(|id| inner.found(cloud, id)).take(limit).collect())
        })
        .await
    }
}

impl Inner {
    fn ensure(&self, call: &Call, id: Id<Access>, rev: Rev, spec: AccessSpec) -> Result<Seen<Access>> {
        if spec.pool != self.pool {
            return Err(Error::invalid("the volume is in another pool")
                .remedy("call the provider of that pool on this host"));
        }
        let tag = Tag { cloud: call.cloud, incarnation: call.incarnation, rev };
        let record = Record { format: FORMAT, tag, spec };
        let old = self.read(id)?;
        if let Some(old) = &old {
            own(&old.tag, call.cloud)?;
            not_older(&old.tag, call, rev)?;
        }
        if old.as_ref() != Some(&record) {
            small::write(&*self.records, &name(id), &encode(&record)?)?;
        }
        self.seen(&record)
    }

    fn remove(&self, call: &Call, id: Id<Access>, upto: Rev) -> Result<()> {
        match self.read(id) {
            Ok(Some(record)) => {
                own(&record.tag, call.cloud)?;
                removable(&record.tag, call, upto)?;
            }
            // Access holds no data, so what cannot be read may go.
            Err(error) if error.kind() != ErrorKind::Internal => return Err(error),
            _ => {}
        }
        let remove = || {
            gone(self.records.remove(&small::draft(&name(id))))?;
            gone(self.records.remove(&name(id)))?;
            self.records.sync()
        };
        remove().map_err(|e: std::io::Error| trouble("remove", &e))
    }

    fn seen(&self, record: &Record) -> Result<Seen<Access>> {
        let spec = &record.spec;
        let absent = Error::not_found("the volume is not in the pool").about(spec.volume.object());
        let (target, phase) = match self.volume(record.tag.cloud, spec)? {
            Some(sidecar) if sidecar.state == State::Whole => (Some(self.target(spec)?), Phase::Settled),
            Some(_) => {
                (None, Phase::Blocked(Error::conflict("the volume is not whole").about(spec.volume.object())))
            }
            None => (None, Phase::Blocked(absent)),
        };
        let is = AccessObserved { target };
        Ok(Seen { applied: record.tag.rev, phase, at: stamp(), is, final_usage: Vec::new() })
    }

    /// The record of the volume, if it is ours.
    fn volume(&self, cloud: Id<Cloud>, spec: &AccessSpec) -> Result<Option<Sidecar>> {
        let file = match self.volumes.open(&meta_name(spec.volume)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| trouble("open the record", &e))?,
        };
        let sidecar = Sidecar::read(&*file)?;
        Ok(Some(sidecar).filter(|s| s.tag.cloud == cloud && s.volume == spec.volume))
    }

    fn target(&self, spec: &AccessSpec) -> Result<Target> {
        let token = Token { folder: self.path.clone(), pool: self.pool, volume: spec.volume };
        Ok(Target {
            id: spec.volume.uuid(),
            term: spec.term,
            mode: spec.mode,
            forms: vec![token.form()?],
            key: None,
        })
    }

    /// An access as the inventory of `cloud` lists it. One whose owner cannot be read is listed for the cloud of this host.
    fn found(&self, cloud: Id<Cloud>, id: Id<Access>) -> Option<Found<Access>> {
        let (tag, seen) = match self.read(id) {
            Ok(record) => record.map(|record| (record.tag, self.seen(&record)))?,
            Err(error) => {
                let tag = Tag { cloud: self.base.home(), incarnation: Uuid::nil(), rev: Rev(0) };
                (tag, Err(error.about(id.object())))
            }
        };
        (tag.cloud == cloud).then_some(Found { id, tag, passport: None, seen })
    }

    fn hello(&self, cloud: Id<Cloud>) -> Result<Hello> {
        self.base.hello(cloud, |incarnation| {
            let tags = self.ids()?.into_iter().filter_map(|id| self.found(cloud, id)).map(|found| found.tag);
            let revs = tags.filter(|tag| tag.incarnation == incarnation).map(|tag| tag.rev);
            Ok(revs.max().unwrap_or(Rev(0)))
        })
    }

    fn ids(&self) -> Result<Vec<Id<Access>>> {
        let names = self.records.names().map_err(|e| trouble("list the folder", &e))?;
        let id = |name: &String| name.strip_suffix(SUFFIX).and_then(|id| Uuid::try_parse(id).ok());
        let mut ids: Vec<_> = names.iter().filter_map(id).map(Id::from_uuid).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn read(&self, id: Id<Access>) -> Result<Option<Record>> {
        let bytes = small::read(&*self.records, &name(id))?;
        bytes.map(|bytes| decode(&bytes)).transpose().map_err(|e| e.about(id.object()))
    }
}

/// The installation of this access: drawn when its folder was made.
fn install(records: &dyn RawFolder) -> Result<Uuid> {
    if let Some(bytes) = small::read(records, INSTALL)? {
        return Uuid::from_slice(&bytes).map_err(|e| {
            Error::invalid("the file `install` of the access folder is damaged")
                .remedy("remove the folder; access is granted again")
                .because(&e)
        });
    }
    let install = Uuid::new_v4();
    small::write(records, INSTALL, install.as_bytes())?;
    Ok(install)
}

fn name(id: Id<Access>) -> String {
    format!("{}{SUFFIX}", id.uuid())
}

fn encode(record: &Record) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 32];
    ciborium::into_writer(record, &mut bytes)
        .map_err(|e| Error::internal("a record of access cannot be written").because(&e))?;
    let sum = Sha256::digest(bytes.get(32..).unwrap_or_default());
    bytes.splice(..32, sum);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Record> {
    let damaged =
        || Error::internal("a record of access is damaged").remedy("remove it; access is granted again");
    let (sum, body) = bytes.split_first_chunk::<32>().ok_or_else(damaged)?;
    if Sha256::digest(body).as_slice() != sum {
        return Err(damaged());
    }
    let record: Record = ciborium::from_reader(body).map_err(|e| damaged().because(&e))?;
    if record.format > FORMAT {
        return Err(Error::unsupported(format!("a record of access has format {}", record.format))
            .remedy("use a newer version of this program"));
    }
    Ok(record)
}

const SUFFIX: &str = ".access";
const INSTALL: &str = "install";
const FORMAT: u16 = 1;
