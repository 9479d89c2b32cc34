//! Part of the IaaS SDK.
