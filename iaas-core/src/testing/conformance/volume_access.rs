//! The contract of [`VolumeAccess`].

use async_trait::async_trait;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::fresh;
use super::calls::id;
use super::calls::ours;
use super::calls::put;
use super::converge;
use super::demand;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use crate::ErrorKind;
use crate::Rev;
use crate::spi::Phase;
use crate::spi::block::Access;
use crate::spi::block::AccessSpec;
use crate::spi::block::VolumeAccess;

/// Access of a host to a pool under test. Each [`ConvergeRig::spec`] names a volume that exists.
#[async_trait]
pub trait AccessRig: ConvergeRig<Access> + Rig<Provider = dyn VolumeAccess> {
    /// A spec whose volume the pool does not have.
    fn missing(&self) -> AccessSpec;

    /// How many volumes the pool has.
    async fn volumes(&self) -> usize;
}

#[async_trait]
impl<R: AccessRig, W: Wrap<dyn VolumeAccess>> AccessRig for Wrapped<R, W> {
    fn missing(&self) -> AccessSpec {
        self.inner.missing()
    }
    async fn volumes(&self) -> usize {
        self.inner.volumes().await
    }
}

/// The checks, in the order of the contracts.
pub fn suite() -> Vec<Check<dyn AccessRig>> {
    let mut all = converge::checks::<Access, dyn AccessRig>();
    all.extend([
        Check::<dyn AccessRig> {
            clause: "target-when-settled",
            run: |rig| Box::pin(target_when_settled(rig)),
        },
        Check { clause: "absent-volume-blocked", run: |rig| Box::pin(absent_volume_blocked(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl AccessRig) -> Report {
    super::run::<dyn AccessRig>("volume access", &suite(), rig).await
}

type Rigged<'a> = &'a dyn AccessRig;

async fn target_when_settled(rig: Rigged<'_>) -> Verdict {
    let access = fresh(rig).await?;
    let spec = rig.spec(1);
    let seen = put(rig, &*access, &ours(1), id(), Rev(1), &spec).await?;
    let target = seen.is.target.ok_or("settled access has no target")?;
    let is = (target.id, target.term, target.mode);
    let wants = (spec.volume.uuid(), spec.term, spec.mode);
    demand!(is == wants, "the target is {is:?}, the spec says {wants:?}");
    demand!(!target.forms.is_empty(), "the target cannot be opened in any way");
    Ok(())
}

async fn absent_volume_blocked(rig: Rigged<'_>) -> Verdict {
    let access = fresh(rig).await?;
    let before = rig.volumes().await;
    match access.ensure(&ours(1), id(), Rev(1), &rig.missing()).await {
        Err(error) => demand!(error.kind() == ErrorKind::NotFound, "it failed with {:?}", error.kind()),
        Ok(seen) => {
            demand!(matches!(seen.phase, Phase::Blocked(_)), "access to nothing is {:?}", seen.phase);
            demand!(seen.is.target.is_none(), "access to nothing has a target");
        }
    }
    let after = rig.volumes().await;
    demand!(before == after, "access to an absent volume made one");
    Ok(())
}
