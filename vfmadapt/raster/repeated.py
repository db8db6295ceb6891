"""A raster of any size on little disk, for measurements: one generated file, repeated by a VRT."""

from pathlib import Path

import numpy as np

_SIDE = 2048


def repeated_raster(folder: Path, side: int, *, bands: int = 4) -> Path:
    """Write a VRT of `side` x `side` pixels, uint8, all of them valid, waves with noise; and the file beneath it."""
    import rasterio
    from rasterio.transform import from_origin

    tile = folder / f"tile_{bands}.tif"
    if not tile.exists():
        y, x = np.mgrid[0:_SIDE, 0:_SIDE] * (40 * np.pi / _SIDE)  # whole waves: no seam where it is repeated
        rng = np.random.default_rng(0)
        waves = [127 + 100 * np.sin(y + i) * np.cos(x - i) + rng.normal(size=y.shape) * 3 for i in range(bands)]
        shape = {"height": _SIDE, "width": _SIDE, "count": bands, "dtype": "uint8", "compress": "lzw"}
        place = {"crs": "EPSG:32632", "transform": from_origin(0, 6_000_000, 10, 10)}
        with rasterio.open(
            tile, "w", driver="GTiff", tiled=True, blockxsize=512, blockysize=512, **shape, **place
        ) as f:
            f.write(np.stack(waves).clip(1, 255).astype(np.uint8))
    lines = [f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><SRS>EPSG:32632</SRS>']
    lines.append("<GeoTransform>0, 10, 0, 6000000, 0, -10</GeoTransform>")
    for band in range(1, bands + 1):
        lines.append(f'<VRTRasterBand dataType="Byte" band="{band}">')
        for row in range(0, side, _SIDE):
            for column in range(0, side, _SIDE):
                size = f'xSize="{min(_SIDE, side - column)}" ySize="{min(_SIDE, side - row)}"'
                lines.append(f'<SimpleSource><SourceFilename relativeToVRT="1">{tile.name}</SourceFilename>')
                lines.append(f"<SourceBand>{band}</SourceBand>")
                lines.append(f'<SourceProperties RasterXSize="{_SIDE}" RasterYSize="{_SIDE}" DataType="Byte"/>')
                lines.append(f'<SrcRect xOff="0" yOff="0" {size}/>')
                lines.append(f'<DstRect xOff="{column}" yOff="{row}" {size}/></SimpleSource>')
        lines.append("</VRTRasterBand>")
    lines.append("</VRTDataset>")
    path = folder / f"{side}.vrt"
    path.write_text("\n".join(lines))
    return path
